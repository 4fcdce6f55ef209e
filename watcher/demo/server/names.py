"""What a model is called: `host/namespace/model:tag`."""

from __future__ import annotations

import re
from typing import NamedTuple

_FIRST = r"[A-Za-z0-9_]"
_HOST = re.compile(_FIRST + r"[A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(_FIRST + r"[A-Za-z0-9_-]{0,79}")
_MODEL = re.compile(_FIRST + r"[A-Za-z0-9_.-]{0,79}")


class Name(NamedTuple):
    """A model's full name; a manifest lies at `<host>/<namespace>/<model>/<tag>`."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Name:
        """From what a user writes, with the usual defaults; may be invalid."""
        tag = ""
        if text.rfind(":") > text.rfind("/"):
            text, _, tag = text.rpartition(":")
            tag = tag or "!"
        rest, slash, model = text.rpartition("/")
        host = namespace = ""
        if slash:
            rest, slash, namespace = rest.rpartition("/")
            if slash:
                host = rest.partition("://")[2] or rest
        return cls(
            host or "registry.ollama.ai", namespace or "library", model or "!", tag or "latest"
        )

    @classmethod
    def of_path(cls, relative: str) -> Name | None:
        """From a path below manifests/, None where it is no valid name."""
        parts = relative.split("/")
        name = cls(*parts) if len(parts) == 4 else None
        return name if name and name.valid else None

    @property
    def valid(self) -> bool:
        """Whether every part has the characters and the length it may have."""
        return bool(
            _HOST.fullmatch(self.host)
            and _NAMESPACE.fullmatch(self.namespace)
            and _MODEL.fullmatch(self.model)
            and _MODEL.fullmatch(self.tag)
        )

    @property
    def path(self) -> str:
        """Its path below manifests/."""
        return "/".join(self)

    @property
    def short(self) -> str:
        """As `ollama list` shows it."""
        if self.host.lower() != "registry.ollama.ai":
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace.lower() != "library":
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    def folded_like(self, other: Name) -> Name:
        """This name with each part spelled as `other` spells it, where only case differs."""
        pairs = zip(self, other, strict=True)
        return Name(*(theirs if ours.lower() == theirs.lower() else ours for ours, theirs in pairs))
