"""What a browser shows at `/`: that the cluster runs, and how to ask it. Knows no request and no cluster."""

from __future__ import annotations

from html import escape

from starlette.responses import HTMLResponse

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script, nothing from elsewhere
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Twostroke</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 4rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f3f3f3; padding: 1rem; overflow-x: auto; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd; }} pre {{ background: #262626; }}
a {{ color: #8ab4f8; }} }}
</style>
</head>
<body>
<h1>Twostroke is running</h1>
<p>This address is for clients of OpenAI's, Anthropic's and Ollama's APIs. Base URL: <code>{origin}/v1</code></p>
<pre>curl {origin}/v1/chat/completions -H 'content-type: application/json' \\
     -d '{{"messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 100}}'</pre>
<p><a href="/v1/models">models</a> · <a href="/v1/cluster">workers</a> · <a href="/metrics">metrics</a> ·
<a href="/health">health</a> (with API keys, all but the last want one: <code>Authorization: Bearer KEY</code>)</p>
<p>In a terminal: <code>twostroke chat</code>, <code>twostroke status</code>.</p>
</body>
</html>
"""


def page(origin: str) -> HTMLResponse:
    """The page of a server at `origin`, such as http://127.0.0.1:8000."""
    return HTMLResponse(_PAGE.format(origin=escape(origin)), headers={"content-security-policy": _POLICY})
