"""Talk to a trained model in the browser: pictures, several turns, where it looked.

    python -m extras.web                       the runs under out/, on http://127.0.0.1:7860
    python -m extras.web --model out/demo/sft

Flow: checkpoint directories -> extras/page.py -> extras/upload_guard.py (to each session its
own pictures) -> a server on this machine alone, unless --host says otherwise. Needs gradio
(requirements-extra.txt). Works without internet: scripts and fonts come from this machine, nothing
is measured or sent, and a header tells the browser to go nowhere else.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

from training.writable import check_directory

PORTS = range(7860, 7960)  # tried in turn, when none is named
LOCAL = ("127.0.0.1", "localhost", "::1")  # names of this machine that nobody else can mean
# What a browser may load for this page: what this server gives, and nothing else.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
          "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src "
          "'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'")


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run that is picked first (default: the "
        "newest below --out)")
    add("--out", default="out", metavar="DIR", help="all runs below it can be picked (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets everyone in who "
        "reaches this machine, without a password (%(default)s)")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--max_upload", type=float, default=20, metavar="MB", help="largest picture file "
        "(%(default)s)")
    add("--language", help="where the public language model lies, if not where it was in training")
    add("--vision", help="where the public vision tower lies, if not where it was in training")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 where the GPU or the processor "
        "is faster in it, else fp32")
    add("--quantize", choices=("int8", "int4"), help="the language model's weights in so many "
        "bits: less memory, and on a CPU faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    flags = parser.parse_args(arguments)
    if not flags.max_upload > 0:
        parser.error(f"--max_upload {flags.max_upload}: expected a number above 0")
    flags.system = flags.template = None  # a checkpoint knows its own
    return flags


class Closed:
    """Around the server: names POLICY in each answer, and takes no request meant for another name.

    The second is for a page elsewhere that makes its own name point to this machine (DNS
    rebinding): the browser would then let it read what is said here.
    """

    def __init__(self, app, hosts: tuple[str, ...] | None):
        self.app, self.hosts = app, hosts  # None: any name will do

    async def __call__(self, scope, receive, send):
        async def send_closed(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []),
                                      (b"content-security-policy", POLICY.encode()),
                                      (b"referrer-policy", b"no-referrer")]
            await send(message)

        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if self.hosts and scope["type"] == "http" and host_name(host) not in self.hosts:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not the name of this server"})
            return
        await self.app(scope, receive, send_closed)


def host_name(header: str) -> str:
    """"localhost:7860" -> "localhost", "[::1]:7860" -> "::1"."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def prepare(flags, directory: str):
    """-> (the server, a socket that listens, its address); server.run(sockets=[socket]) serves.

    directory: for uploaded pictures. Left to itself, gradio puts them where every gradio on this
    machine does, and each clears up there when it ends.
    Gradio's own launch() would ask itself for the page first, through the proxy of the environment
    if it names one, and fail where that knows no 127.0.0.1; so the server is uvicorn, plainly.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is loaded: it would ask for
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # its newest version's number
    directory = os.path.realpath(directory)  # paths are compared with it, letter by letter
    os.environ["GRADIO_TEMP_DIR"] = directory
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from extras.page import CSS, FONTS, Models, build
    from extras.upload_guard import EXAMPLES, OwnFiles

    models = Models(flags)
    if not models.names():
        raise FileNotFoundError(f"no run with a checkpoint below {flags.out}: train one, as README "
                                "says, or give --model DIR or --out DIR")
    models.get(models.names()[0])  # now, so that what is wrong with it is told here
    listener = listen(flags.host, flags.port)
    host, port = listener.getsockname()[:2]
    page = build(models, Path(directory, EXAMPLES)).queue(max_size=64)
    largest = int(flags.max_upload * 1e6)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", server_name=host,
        server_port=port, max_file_size=largest, footer_links=[],
        run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        css=CSS, theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]))
    page.has_launched = True  # or gradio does not even compare paths with its directory
    app = OwnFiles(app, Path(directory), f"session_{port}", largest, page.upload_file_set)
    own = LOCAL if host in LOCAL else None
    server = uvicorn.Server(uvicorn.Config(Closed(app, own), log_level="warning"))
    name = f"[{host}]" if ":" in host else host
    return server, listener, f"http://{name}:{port}/"


def listen(host: str, port: int | None) -> socket.socket:
    """port None: the first free one of PORTS. OSError: it is taken, or this is no address here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in PORTS if port is None else (port,):
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            problem = OSError(f"cannot listen at {host}, port {number}: {error}")
    raise problem


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    try:
        check_directory("the directory for uploaded pictures (TMPDIR)", tempfile.gettempdir())
        with tempfile.TemporaryDirectory(prefix="vlm_web_") as directory:  # nobody else's to read
            server, listener, address = prepare(flags, directory)
            print(f"talk to it at {address} (Ctrl-C ends)", flush=True)
            server.run(sockets=[listener])
    except ImportError as error:
        raise SystemExit("the page needs gradio: pip install gradio (requirements-extra.txt)"
                         f" [{error}]") from error
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"extras.web: {error}") from error


if __name__ == "__main__":
    main()
