"""Each session its own files: what somebody uploads is opened and served for nobody else.

    request -> cookie (drawn at random) -> the session's own directory, named by the cookie's hash
    upload       -> own directory/random name/the file's name -> its path, told to the browser
    message      -> every path that it names must lie in the own directory, or be an example
    GET of file= -> likewise

Gradio itself believes the paths of a message, and copies the files to where it serves them; it
compares them with its upload directory only after launch(), which a server of one's own never
calls, and its upload directory is one for all. So this stands before it, and hands nothing on that
it has not understood.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from gradio.route_utils import GradioMultiPartParser
from gradio.routes import file_upload_statuses
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

UPLOAD, FILE = "/gradio_api/upload", "/gradio_api/file"
LARGEST_MESSAGE = 1_000_000  # bytes; pictures do not go in messages
MOST_FILES = 100  # in one upload
EXAMPLES = "examples"  # the directory whose files are for everyone
OWN = "own_files"  # where a request's scope holds the session's directory


class Refused(Exception):
    """status, sentence: what is answered."""


class OwnFiles:
    """An ASGI app around another, which lays its files below `directory` (a real path).

    cookie: its name. Two servers on one machine need two: a cookie is sent to every port.
    largest: bytes of an uploaded file. uploads: a set that gets to know the path of each one.
    """

    def __init__(self, app, directory: Path, cookie: str, largest: int, uploads: set):
        self.app, self.directory, self.cookie = app, directory, cookie
        self.largest, self.uploads = largest, uploads
        self.used = {}  # path of an upload -> the open page (gradio's session_hash) that named it

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        known = re.search(rf"(?:^|;) *{self.cookie}=([0-9a-f]{{64}}) *(?:;|$)",
                          "; ".join(request.headers.getlist("cookie")))
        key = known[1] if known else secrets.token_hex(32)
        # A path is told to the page, and may be told on; the key cannot be guessed from it.
        own = self.directory / hashlib.sha256(key.encode()).hexdigest()
        set_cookie = f"{self.cookie}={key}; Path=/; HttpOnly; SameSite=Lax".encode()

        async def send_key(message):
            if message["type"] == "http.response.start" and not known:
                message["headers"] = [*message.get("headers", []), (b"set-cookie", set_cookie)]
            await send(message)

        try:
            _, found, asked = scope["path"].partition(FILE)
            if found and not self.may(asked[1:], own):
                raise Refused(403, "this file is not of your session, or no longer here")
            if scope["path"] == UPLOAD and scope["method"] == "POST":
                answer = JSONResponse(await self.upload(request, own))
                await answer(scope, receive, send_key)
                return
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = replay(await self.checked(request, own), receive)
        except Refused as refusal:
            status, sentence = refusal.args
            await JSONResponse({"detail": sentence}, status)(scope, receive, send_key)
        except ClientDisconnect:  # nobody is there to be answered
            pass
        else:
            await self.app({**scope, OWN: own}, receive, send_key)

    def may(self, path, own: Path) -> bool:
        """Whether a session may have this file. The text alone decides first: nothing is looked
        for at a path from elsewhere."""
        return (isinstance(path, str) and "\0" not in path and os.path.normpath(path) == path
                and path.startswith((f"{own}{os.sep}", f"{self.directory / EXAMPLES}{os.sep}"))
                and os.path.realpath(path) == path and os.path.isfile(path))

    async def checked(self, request: Request, own: Path) -> bytes:
        """A message's body, written anew: no reader behind can see other things in it than are
        checked here."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST_MESSAGE:
                raise Refused(413, f"a message has at most {LARGEST_MESSAGE:,} bytes")
        try:
            message = json.loads(body or b"null")
            page = message.get("session_hash") if isinstance(message, dict) else None
            return json.dumps(self.clean(message, own, page)).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(400, "expected a message in JSON") from error

    def clean(self, value, own: Path, page):
        """The value, with nothing left of a file's description but its path."""
        if isinstance(value, list):
            return [self.clean(part, own, page) for part in value]
        if not isinstance(value, dict):
            return value
        if "path" not in value:
            return {name: self.clean(part, own, page) for name, part in value.items()}
        path = value["path"]
        if not self.may(path, own) or (path.startswith(f"{own}{os.sep}")
                                       and self.used.setdefault(path, page) != page):
            raise Refused(403, "this picture was not uploaded in this session, or is no longer "
                          "here: upload it, with the cookie that the page has set")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    async def upload(self, request: Request, own: Path) -> list[str]:
        """Write the files of a form -> their paths."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(400, "expected multipart/form-data")
        number = request.query_params.get("upload_id")  # for the bar that shows how far it is
        if number:
            file_upload_statuses.track(number)
        parser = GradioMultiPartParser(
            request.headers, request.stream(), max_files=MOST_FILES, max_file_size=self.largest,
            upload_id=number, upload_progress=file_upload_statuses if number else None)
        parser.upload_dir = self.directory  # what is broken off goes with it
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise Refused(413 if "maximum allowed size" in error.message else 400,
                          error.message) from error
        paths = []
        for _, file in form.multi_items():
            if isinstance(file, str):  # a field that is no file
                continue
            file.file.close()
            # Of other characters a URL or a file system might make another name.
            name = re.sub(r"[^\w. -]", "_", file.filename)[-60:].strip(". ")
            paths.append(str(new_file(own, name or "file")))
            shutil.move(file.file.name, paths[-1])
        self.uploads.update(paths)
        return paths


def new_file(own: Path, name: str) -> Path:
    """A path of this name, in a new directory that no other file shares."""
    place = own / secrets.token_hex(16)
    place.mkdir(parents=True)
    return place / name


def replay(body: bytes, receive):
    """An ASGI receive that gives the body, and then what the first one gives."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return waiting.pop() if waiting else await receive()

    return again
