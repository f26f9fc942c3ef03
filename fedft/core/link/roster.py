"""A roster: the public keys of a federation's clients, signed by the authority away from the server.

Where it is in a kit, the server cannot make up a client, nor put its own key in a client's place,
for those who hold the kit. Protocols in which clients encrypt for each other rest on that.

    {"format": "fedft-roster/1", "made": "2026-…", "keys": {"alice": "<sha256>", …}, "signature": …}

The signature is the authority's, ECDSA over SHA-256, of the format's name, a zero byte, and the
rest as JSON with sorted keys and without spaces.
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.link.secrets import key_digest, load_certificate

ROSTER_FORMAT = "fedft-roster/1"


@dataclass(frozen=True)
class Roster:
    """Who the clients are.

    Attributes:
        keys: name → digest of the client's public key, see
            :func:`~fedft.core.link.secrets.key_digest`.
        made: ISO 8601, UTC.
    """

    keys: Mapping[str, str]
    made: str

    def signed(self, sign: Callable[[bytes], bytes]) -> str:
        """As text, with the authority's signature."""
        signature = base64.b64encode(sign(self._signed_bytes())).decode()
        table = {
            "format": ROSTER_FORMAT,
            "made": self.made,
            "keys": dict(sorted(self.keys.items())),
        }
        return json.dumps({**table, "signature": signature}, indent=1) + "\n"

    @classmethod
    def verified(cls, text: str, ca_pem: bytes) -> "Roster":
        """Read a roster that the authority signed.

        Args:
            text: as :meth:`signed` gives it.
            ca_pem: certificate of the authority.

        Raises:
            ConfigError: it is no roster.
            SecurityRefusal: it was changed, or another authority signed it.
        """
        roster, signature = cls._parsed(text)
        key = load_certificate(ca_pem, "the kit").public_key()
        try:
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise InvalidSignature
            key.verify(signature, roster._signed_bytes(), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise SecurityRefusal(
                "the roster of the clients' keys was not signed by the authority beside it",
                fix="The file was changed on its way, or is of another authority; ask for a new one.",
            ) from None
        return roster

    def check(self, name: str, key: Any) -> None:
        """Refuse a public key that is not this client's.

        Args:
            name: of the client.
            key: public or private; of the latter the public half counts.

        Raises:
            SecurityRefusal: the roster has no such client, or another key of it.
        """
        pinned, found = self.keys.get(name), key_digest(key)
        if pinned != found:
            raise SecurityRefusal(
                f"{name[:80]!r} has the key {found[:16]}…, and the roster of this federation has "
                + ("no such client" if pinned is None else f"{pinned[:16]}…"),
                fix="Ask whoever keeps the authority: fedft ca roster, then new kits.",
            )

    def _signed_bytes(self) -> bytes:
        body = {"keys": dict(self.keys), "made": self.made}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return ROSTER_FORMAT.encode() + b"\0" + text.encode()

    @classmethod
    def _parsed(cls, text: str) -> tuple["Roster", bytes]:
        try:
            table = cast(dict[str, Any], json.loads(text))
            if set(table) != {"format", "made", "keys", "signature"}:
                raise ValueError("other fields")
            if table["format"] != ROSTER_FORMAT or not isinstance(table["made"], str):
                raise ValueError("another format")
            keys = {str(name): str(digest) for name, digest in table["keys"].items()}
            return cls(keys, table["made"]), base64.b64decode(table["signature"], validate=True)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(
                "this is no roster of clients' keys of this version of fedft",
                fix="Use the file that `fedft ca roster` wrote, as it is.",
            ) from error
