"""The pages: a fixed table, read once. No path of a request ever names a file."""

from qvgpt.lens.page import site

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def load() -> dict[str, tuple[bytes, str]]:
    """Path → content and its type."""
    return {path: (body.encode(), kind) for path, (body, kind) in site().items()}
