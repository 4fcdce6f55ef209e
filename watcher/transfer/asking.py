"""Asking one registry: with a token where it wants one, and what its refusals mean.

What identifies us goes to the registry alone, never along a redirect.
"""

from __future__ import annotations

import time
from typing import NamedTuple
from urllib.parse import urlsplit

from watcher.transfer import answers, auth, redirects
from watcher.transfer.client import Answer, Client, Request
from watcher.transfer.values import BusyError, Cause, TransferError, TryError

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
GONE = frozenset({404, 410})
_LATER = frozenset({429, 503})
#: Refusals that may pass: a request that took too long, or came too early.
_PASSING = frozenset({408, 425})


class Access(NamedTuple):
    """How a registry is asked."""

    #: Take unknown certificates.
    insecure: bool = False
    #: By http, for who asks for both; this machine's own registries are asked so anyway.
    plain: bool = False
    #: The key that signs for tokens; "" for none.
    key: str = ""
    stall: float = 30.0
    #: The addresses of mirrors.
    mirrors: tuple[str, ...] = ()
    #: The file with logins (netrc); "" for none.
    logins: str = ""


class Asker:
    """Asks the registry at one address."""

    def __init__(self, client: Client, origin: str, access: Access) -> None:
        """`origin`: scheme, host and port, without a slash. Raises TransferError for no port."""
        try:
            redirects.origin(origin)
        except ValueError:
            text, step = f"{origin}: invalid port", "check the registry's address in the name"
            raise TransferError(text, step, Cause.WRONG_ANSWER) from None
        self._client, self._access = client, access
        self._origin = origin
        #: The header that lets us in; "" for none.
        self._authorization = ""

    async def followed(self, request: Request) -> tuple[str, Answer]:
        """The answer to a path at the end of a few redirects, and where that is. Raises TryError.

        Another host gets no credentials.
        """

        async def ask(request: Request) -> Answer:
            return await (self.ask if self.is_own(request.url) else self.ask_unknown)(request)

        return await redirects.followed(ask, request._replace(url=self._origin + request.url))

    async def ask(self, request: Request) -> Answer:
        """The registry's answer; with a token, where it wants one. Raises TryError."""
        answer = await self._as_known(request)
        if answer.head.status == 401:
            header = answer.head.headers.get("www-authenticate", "")
            for enter in (self._log_in, self._get_token, self._sign):
                if await enter(header):
                    answer = await self._as_known(request)
                    if answer.head.status != 401:
                        break
        return answer

    async def ask_unknown(self, request: Request) -> Answer:
        """The answer of somebody who gets no credentials. Raises TryError."""
        return await self._client.ask(self.as_asked(request))

    def is_own(self, url: str) -> bool:
        """Whether an address is the registry's own."""
        return redirects.origin(url) == redirects.origin(self._origin)

    def as_asked(self, request: Request) -> Request:
        seconds = request.seconds if request.body else self._access.stall
        return request._replace(insecure=self._access.insecure, seconds=seconds)

    def authorization(self) -> tuple[str, ...]:
        """The header that goes with a request to the registry, if any."""
        return (f"Authorization: {self._authorization}",) if self._authorization else ()

    async def _as_known(self, request: Request) -> Answer:
        headers = (*request.headers, *self.authorization())
        return await self._client.ask(self.as_asked(request._replace(headers=headers)))

    # ------------------------------------------------------------ ways in, by what a 401 says

    async def _log_in(self, header: str) -> bool:
        """With a login that the user keeps for the host that wants one. Raises TryError."""
        asked = self._challenge(header)
        url = self._origin if asked is None else asked.address()
        login = auth.login(url, self._access.logins)
        if not login:
            return False
        if asked is None:
            self._authorization = login
            return header.lower().startswith("basic")
        return await self._renew(url, login)

    async def _get_token(self, header: str) -> bool:
        """With a token for everybody. Where that gives none, the next way is tried, too."""
        asked = self._challenge(header)
        if asked is not None:
            await self._renew(asked.address())
        return asked is not None

    async def _sign(self, header: str) -> bool:
        """With a token that the user's key signs for. Raises TryError."""
        asked = self._challenge(header)
        own = urlsplit(self._origin)
        if asked is None or urlsplit(asked.realm).hostname != own.hostname:
            return False  # a signature is for the registry alone
        try:
            url, signature = auth.signed(asked, self._access.key)
        except auth.NoKeyError as error:
            text = f"{own.netloc} wants a signature, and {error}"
            raise TryError(text, Cause.NOT_ALLOWED, final=True) from None
        return await self._renew(url, signature)

    def _challenge(self, header: str) -> auth.Challenge | None:
        asked = auth.challenge(header)
        if asked is None:
            return None
        return asked._replace(realm=redirects.referred(self._origin, asked.realm))

    async def _renew(self, url: str, authorization: str = "") -> bool:
        """Get a token; False where this realm gives none this way. Raises TryError."""
        self._authorization = ""
        headers = (f"Authorization: {authorization}",) if authorization else ()
        answer = await self.ask_unknown(Request(url, headers, limit=128 * 1024))
        if answer.head.status in _LATER or answer.head.status >= 500:
            raise failure(urlsplit(self._origin).netloc, answer)
        token = auth.token(answer.body) if answer.head.status == 200 else ""
        self._authorization = f"Bearer {token}" if token else ""
        return bool(token)


def failure(host: str, answer: Answer, *, is_own: bool = True) -> TryError:
    """What a host's answer that is not the wanted one means; `is_own`: the registry's."""
    status, words = answer.head.status, answers.words(answer.body)
    text = f"{host} answers {status}" + (f": {words}" if words else "")
    if status in _LATER:
        return BusyError(text, answers.retry_after(answer.head, time.time()))
    if not is_own:
        return TryError(text)  # a new address may do better
    if status in GONE:
        return TryError(text, Cause.NO_SUCH_MODEL, final=True)
    if status == 412:
        return TryError(text, Cause.NEWER_OLLAMA, final=True)
    if status in (401, 403):
        return TryError(text, Cause.NOT_ALLOWED, final=True)
    is_refused = 400 <= status < 500 and status not in _PASSING
    cause = Cause.NETWORK if status >= 500 else Cause.WRONG_ANSWER
    return TryError(text, cause, final=is_refused)
