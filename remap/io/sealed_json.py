"""JSON that carries its own SHA-256: a changed byte is noticed. It tells damage, not who wrote the file."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from remap.io.atomic_write import json_text
from remap.io.checked_json import parse_json

# The last entry of a sealed file.
SEAL = "seal"


def seal(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def sealed_text(body: Mapping[str, Any]) -> str:
    """Return the text of a JSON file with its seal."""
    return json_text({**body, SEAL: seal(body)})


def parse_sealed(data: bytes) -> tuple[Any, bool]:
    """Return the values of a JSON file without its seal, and whether it had one.

    Raises:
        ValueError: It is not JSON, or does not fit its seal in every byte.
    """
    values = parse_json(data)
    if not isinstance(values, dict) or SEAL not in values:
        return values, False
    body = {name: value for name, value in values.items() if name != SEAL}
    # The whole text, not only the seal: a changed space or letter of a number's exponent is damage too.
    if sealed_text(body).encode() != data:
        raise ValueError("it is damaged, or was edited: it does not fit its own SHA-256")
    return body, True
