"""The pages: a fixed table, read once. No path of a request ever names a file."""

from importlib.resources import files

STATIC: dict[str, tuple[str, str, str]] = {
    "/": ("qvgpt.serve", "index.html", "text/html; charset=utf-8"),
}
"""Path → package, resource in it, content type."""

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def load() -> dict[str, tuple[bytes, str]]:
    """Path → content and its type."""
    return {
        path: (files(package).joinpath(name).read_bytes(), kind)
        for path, (package, name, kind) in STATIC.items()
    }
