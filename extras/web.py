"""Talk to a trained model in the browser: images, several turns, where it looked.

    python -m extras.web                       the runs under out/, on http://127.0.0.1:7860
    python -m extras.web --model out/demo/sft

Flow: checkpoint directories -> page.py (components of gradio) -> upload_guard.py -> a server on
this machine alone, unless --host says otherwise. Needs gradio (requirements-extra.txt). Works
without internet: scripts and fonts come from this machine, and nothing is measured or sent.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

from training.inference import add_model_flags, exit_on_error
from training.writable import check_directory

PORTS = range(7860, 7960)  # tried in turn, when none is named
LOCAL = ["127.0.0.1", "localhost", "::1", "[::1]"]  # names that nobody else's machine can have


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m extras.web", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run that is picked first (default: the "
        "newest below --out)")
    add("--out", default="out", metavar="DIR", help="all runs below it can be picked (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets everyone in who "
        "reaches this machine, without a password (%(default)s)")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--max_upload", type=float, default=20, metavar="MB", help="largest image file "
        "(%(default)s)")
    add_model_flags(parser)
    flags = parser.parse_args(arguments)
    if not flags.max_upload > 0:
        parser.error(f"--max_upload {flags.max_upload}: expected a number above 0")
    flags.system = flags.template = None  # a checkpoint knows its own
    return flags


def prepare(flags, directory: str):
    """-> (the server, a socket that listens, its address); server.run(sockets=[socket]) serves.

    directory: for uploaded images. By default gradio puts them where every gradio on this machine
    does, and each clears up there when it ends.
    Gradio's own launch() would ask itself for the page first, through the proxy of the environment
    if it names one, and fail where that knows no 127.0.0.1; so the server is uvicorn itself.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is loaded: it would ask for
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # its newest version's number
    os.environ["GRADIO_TEMP_DIR"] = directory = os.path.realpath(directory)
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from extras.page import CSS, FONTS, I18N, Models, build, write_examples
    from extras.upload_guard import SecurityMiddleware

    models = Models(flags)
    if not models.names():
        raise FileNotFoundError(f"no run with a checkpoint below {flags.out}: train one, as README "
                                "says, or give --model DIR or --out DIR")
    models.get(models.names()[0])  # now, so that what is wrong with it is reported here
    listener = listen(flags.host, flags.port)
    host, port = listener.getsockname()[:2]
    examples = write_examples(Path(directory))
    page = build(models, examples).queue(max_size=64)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", server_name=host,
        server_port=port, footer_links=["settings"], run_history=False, enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False, i18n=I18N, css=CSS,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]))
    page.has_launched = True  # or gradio does not even compare paths with its directory
    app = SecurityMiddleware(app, Path(directory), f"session_{port}", int(flags.max_upload * 1e6),
                             page.upload_file_set, [file for _, file in examples])
    # A page elsewhere could make its own name point to this machine (DNS rebinding), and the
    # browser would let it read the answers.
    app = TrustedHostMiddleware(app, LOCAL if host in LOCAL else ["*"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    return server, listener, f"http://{f'[{host}]' if ':' in host else host}:{port}/"


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
    with exit_on_error("extras.web"):
        check_directory("the directory for uploaded images (TMPDIR)", tempfile.gettempdir())
        with tempfile.TemporaryDirectory(prefix="vlm_web_") as directory:  # nobody else's to read
            try:
                server, listener, address = prepare(flags, directory)
            except ImportError as error:
                raise SystemExit("the page needs gradio: pip install gradio "
                                 f"(requirements-extra.txt) [{error}]") from error
            print(f"talk to it at {address} (Ctrl-C ends)", flush=True)
            server.run(sockets=[listener])


if __name__ == "__main__":
    main()
