"""Which requests are answered: those of the page itself, with its token."""

import secrets
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: nothing is loaded from elsewhere, and no other page includes it."""


class Guard:
    """Answers 403 to requests of another host or origin, and to those without the token.

    The host is compared because another name may lead to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str]) -> None:
        self.app, self.token, self.hosts = app, token, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        allowed = scope["type"] == "http" and self._allows(scope)
        app = self.app if allowed else PlainTextResponse("forbidden\n", status_code=403)
        await app(scope, receive, send_guarded)

    def _allows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        given = scope["path"].split("/")[1].encode()
        return (
            host in self.hosts
            and headers.get("origin", f"http://{host}") == f"http://{host}"
            and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
            and secrets.compare_digest(given, self.token.encode())
        )
