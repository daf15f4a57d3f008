"""Talk to a trained model in the browser: pictures, several turns, where it looked.

    python web.py                       the runs under out/, on http://127.0.0.1:7860
    python web.py --model out/demo/sft

Flow: checkpoint directories -> evaluation/page.py -> a server on this machine alone, unless --host
says otherwise. Needs gradio (requirements-extra.txt). Works without internet: scripts and fonts
come from this machine, nothing is measured or sent, and a header tells the browser to go nowhere
else.
"""

import argparse
import os
import tempfile
from pathlib import Path

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
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
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
        if self.hosts and scope["type"] == "http" and host.rpartition(":")[0] not in self.hosts:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not the name of this server"})
            return
        await self.app(scope, receive, send_closed)


def serve(flags, wait: bool = True):
    """Start the server -> (page, its address). wait: until Ctrl-C. OSError: the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is loaded: it would ask for
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # its newest version's number
    import gradio as gr
    from starlette.middleware import Middleware

    from evaluation.page import CSS, FONTS, Models, build

    models = Models(flags)
    if not models.names():
        raise FileNotFoundError(f"no run with a checkpoint below {flags.out}: train one, as README "
                                "says, or give --model DIR or --out DIR")
    models.get(models.names()[0])  # now, so that what is wrong with it is told here
    directory = Path(tempfile.mkdtemp(prefix="vlm_examples_"))
    page = build(models, directory).queue(max_size=64)
    own = ("127.0.0.1", "localhost", "[::1]") if flags.host in ("127.0.0.1", "localhost") else None
    _, address, _ = page.launch(
        server_name=flags.host, server_port=flags.port, share=False, quiet=True, inbrowser=False,
        prevent_thread_lock=True, max_file_size=int(flags.max_upload * 1e6), footer_links=[],
        run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        allowed_paths=[str(directory)], css=CSS,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(Closed, hosts=own)]})
    print(f"talk to it at {address} (Ctrl-C ends)", flush=True)
    if wait:
        page.block_thread()
    return page, address


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    try:
        serve(flags)
    except ImportError as error:
        raise SystemExit("web.py needs gradio: pip install gradio (requirements-extra.txt)"
                         f" [{error}]") from error
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"web.py: {error}") from error


if __name__ == "__main__":
    main()
