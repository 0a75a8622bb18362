"""Who may use the server: checks of every request before any of its body is read.

    Host            names this server, against pages that rebind their domain to this machine
    Origin          absent, this server's own, or allowed, against other pages in a user's browser
    Authorization   the API key, if there is one, compared in constant time

Responses say that they are not to be framed, sniffed or cached.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

PUBLIC_PATHS = frozenset(("/health", "/"))
"""The paths that need no key: the state for a load balancer, and the page that asks for the key."""

PUBLIC_FOLDER = "/page/"
"""The files of the page, which need no key either."""

RESPONSE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
}
"""The headers of every response. The page may load its own files only."""

CORS_METHODS = "GET, POST"
PREFLIGHT_SECONDS = "600"
"""The time for which a browser may remember the answer to a preflight request."""


class Gate:
    """Middleware that refuses requests which may not use the server."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        added = dict(RESPONSE_HEADERS)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in added.items():
                    sent.setdefault(name, value)
            await send(message)

        try:
            self._check_host(headers)
            added |= self._cors(headers)
            if _is_preflight(scope, headers):
                await _preflight(headers, send_with_headers)
                return
            self._check_key(scope["path"], headers)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        try:
            name = urlsplit(f"//{given[0]}").hostname if len(given) == 1 else None
        except ValueError:
            name = None
        if not name or not self._settings.accepts_host(name):
            raise ApiError(
                403,
                "the Host header must be a name of this server. Use its address, or start it with --allow-host NAME.",
                code="host_not_allowed",
            )

    def _cors(self, headers: Headers) -> dict[str, str]:
        """Returns the headers that let an allowed page read the response. Raises ApiError for other pages."""
        origin = headers.get("origin")
        if origin is None or origin.lower().partition("://")[2] == headers.get("host", "").lower():
            return {"Vary": "Origin"}
        allowed = self._settings.allow_origin
        if "*" not in allowed and origin not in allowed:
            raise ApiError(
                403,
                "pages of this origin may not use the server. Start it with --allow-origin ORIGIN.",
                code="origin_not_allowed",
            )
        return {
            "Access-Control-Allow-Origin": origin,
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Vary": "Origin",
        }

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key)
        if scheme.lower() != "bearer" or not right:
            what = "is wrong" if given else "is missing"
            raise ApiError(
                401,
                f"the API key {what}. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


async def _preflight(headers: Headers, send: Send) -> None:
    """Answers the question of a browser whether a page may send a request."""
    sent = [
        (b"access-control-allow-methods", CORS_METHODS.encode()),
        (b"access-control-allow-headers", headers.get("access-control-request-headers", "").encode("latin-1")),
        (b"access-control-max-age", PREFLIGHT_SECONDS.encode()),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": sent})
    await send({"type": "http.response.body", "body": b""})
