"""The bundle of certificates that https trusts.

A wheel of libcurl knows no system's own place of it, so it is looked for here: where the user says,
where the distributions keep it, else certifi's.
"""

from __future__ import annotations

import os
from typing import NamedTuple

#: Debian, Arch, Alpine; Fedora and RHEL, old and new; openSUSE; NixOS; Alpine and the BSDs.
PLACES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


class Trust(NamedTuple):
    """A file of certificates, and a folder of them; "" for none."""

    file: str
    folder: str = ""


def find(places: tuple[str, ...] = PLACES) -> Trust:
    """What to trust. Both are "" where nothing is found: then https fails, and says so."""
    file, folder = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    if file or folder:
        return Trust(file, folder)
    for place in places:
        if os.access(place, os.R_OK):
            return Trust(place)
    try:
        import certifi
    except ImportError:
        return Trust("")
    return Trust(certifi.where())
