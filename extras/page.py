"""The page to talk to a model: components of gradio, and what happens when one is used.

    a browser's session -> Session (its own Conversation) -> reply, piece by piece -> the page
    runs under --out    -> Models -> the one that is picked, loaded once

What was said lives in the session's state on the server, which gradio finds by a random key that
each open page draws for itself; the model's weights are the only thing that sessions share. The
browser sends text and images, and no history that it could make up.
"""

import html
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import gradio as gr

from dataset.emoji.world import TEST_START, picture, scene
from extras.attention import draw_attention
from extras.upload_guard import MAX_IMAGES
from model.pretrained.checkpoint import checkpoints, newest_checkpoint
from training.inference import Conversation, load_model

MAX_LOADED = 2  # models; sessions that pick others in turn would load them again and again
PAUSE = 0.1  # seconds between two updates of a growing answer: for each, gradio reads all images
MAX_CHARACTERS = 4000  # of one message
EXAMPLES = ((1003, "What do you see?"), (1003, "右下角是什么？"), (8, "How many things are there?"))
# Gradio's own buttons below what a person said: one of them shares it on the internet.
CSS = ".message-buttons-right { display: none !important; }"
FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
TEXTS = {  # gradio shows them in the language of the browser, or the one picked in its settings
    "title": ("## Show it an image and talk about it", "## 给它看图，和它对话"),
    "chat": ("Conversation", "对话"),
    "nothing": ("Nothing was said yet.", "还没有对话。"),
    "box": ("Drop images here, then ask", "把图片拖到这里，然后提问"),
    "stop": ("Stop", "停止"),
    "reset": ("New conversation", "新对话"),
    "look": ("Where did it look?", "它在看哪里？"),
    "examples": ("Examples", "示例"),
    "model": ("Model", "模型"),
    "temperature": ("Temperature (0: always the likeliest token)", "温度（0：总是取最可能的词元）"),
    "top_p": ("Top p (draw from the likeliest tokens that reach this share)",
              "Top p（从累计达到此概率的最可能的词元中抽取）"),
    "longest": ("Longest answer, in tokens", "回答的最大长度（词元数）"),
    "looks": ("Where it looked for each word, and what each image token stands for",
              "每个词看的是图中何处，以及每个图像词元最接近的词"),
    "question": ("What do you see?", "你看到了什么？"),
    "no_answer": ("There is no answer yet to look at.", "还没有回答可以查看。")}
I18N = gr.I18n(en={name: english for name, (english, _) in TEXTS.items()},
               zh={name: chinese for name, (_, chinese) in TEXTS.items()})


def text_for(request: gr.Request, name: str) -> str:
    """A text that the server shows, in the language that the browser asks for."""
    chinese = request.headers.get("accept-language", "").strip().lower().startswith("zh")
    return TEXTS[name][chinese]


@dataclass
class Session:
    """What one open page has said and shown."""

    model: str
    conversation: Conversation
    turns: list = field(default_factory=list)  # as gr.Chatbot takes them


class Models:
    """The runs below a directory, newest first, and the few that are loaded."""

    def __init__(self, flags):
        """flags: model, out, and what load_model reads."""
        self.flags = flags
        self.load = lru_cache(MAX_LOADED)(lambda name: load_model(flags, name))

    def names(self) -> list[str]:
        root = Path(self.flags.out)
        runs = [path for path in (root, *root.glob("*"), *root.glob("*/*"))
                if path.is_dir() and checkpoints(path)]
        runs.sort(key=lambda path: newest_checkpoint(path).stat().st_mtime, reverse=True)
        return list(dict.fromkeys([*filter(None, [self.flags.model]), *map(str, runs)]))

    def get(self, name: str) -> tuple:
        """(model, template, processor). ValueError: it is not among the names, so that nobody who
        reaches the page can have any directory opened."""
        if name not in self.names():
            raise ValueError(f"there is no model {name} (any more): pick one of the list")
        return self.load(name)


def respond(models: Models, said: dict, session: Session | None, name: str, sampling: dict,
            question: str):
    """Yield (what the chat shows, what stands in the box, session), again and again as text comes.

    said: {"text", "files"} of the box; it stays there, and a warning is shown, when it cannot be
    answered. sampling: temperature, top_p and max_new_tokens. question: about images alone.
    """
    files = said["files"]
    text = said["text"].strip() or (question if files else "")
    if not text:
        yield session.turns if session else [], None, session
        return
    try:
        if len(files) > MAX_IMAGES or len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(files)} images and {len(text):,} characters at once: at most "
                             f"{MAX_IMAGES} and {MAX_CHARACTERS:,} are taken")
        if session is None or session.model != name:
            session = Session(name, Conversation(*models.get(name), {}))
        session.conversation.sampling.update(sampling)
        show(session.conversation, files)
        before = [*session.turns, *({"role": "user", "content": {"path": file}} for file in files),
                  {"role": "user", "content": text}]
        answer, updated = "", float("-inf")
        # The text stays in the box until the answer begins: only then is nothing wrong with it.
        for piece in session.conversation.reply(text):
            answer += piece
            # Each time, for whoever stops the answer: as far as it came it is remembered.
            session.turns = [*before, {"role": "assistant", "content": answer}]
            if time.monotonic() - updated > PAUSE:
                yield session.turns, None, session
                updated = time.monotonic()
        yield session.turns, None, session
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        warn(str(error))
        yield session.turns if session else [], said, session


def warn(text: str) -> None:
    """In a corner of the page. It would show HTML, and a file may have any name."""
    gr.Warning(html.escape(text), duration=15, title="")


def show(conversation: Conversation, files: list) -> None:
    """All of them or none. An error names a file, not its path on this machine."""
    conversation.waiting = []
    for file in files:
        try:
            conversation.show(file)
        except (OSError, ValueError) as error:
            conversation.waiting = []
            raise ValueError(str(error).replace(str(file), Path(file).name)) from error


def attention_image(session: Session | None, no_answer: str):
    """Where the model looked for the last answer -> a figure; None, and a warning says why."""
    try:
        if session is None or not session.conversation.answer_ids:
            raise ValueError(no_answer)
        return draw_attention(session.conversation)
    except ValueError as error:
        warn(str(error).removeprefix("--attention: "))
        return None


def write_examples(directory: Path) -> list[tuple[str, str]]:
    """Unseen scenes of the emoji world, written to the directory -> (question, path) of each."""
    examples = []
    for number, question in EXAMPLES:
        file = directory / f"scene_{number}.png"
        picture(scene(TEST_START + number)).save(file)
        examples.append((question, str(file)))
    return examples


def build(models: Models, examples: list[tuple[str, str]]) -> gr.Blocks:
    def answer(said, session, name, temperature, top_p, longest, request: gr.Request):
        sampling = {"temperature": float(temperature), "top_p": float(top_p),
                    "max_new_tokens": int(longest)}
        yield from respond(models, said, session, name, sampling, text_for(request, "question"))

    def look(session, request: gr.Request):
        image = attention_image(session, text_for(request, "no_answer"))
        if image is None:
            return nothing_seen
        # By default it would lie where everyone's does; it shows what one session uploaded.
        file = request.request.scope["new_file"]("looks.png")
        image.savefig(file, dpi=100)
        return gr.update(value=file, visible=True)

    def pick():
        """The models that are there when the page is opened."""
        names = models.names()
        return gr.update(choices=names, value=next(iter(names), None))

    nothing_seen = gr.update(value=None, visible=False)
    with gr.Blocks(title="Afternoon VLM", analytics_enabled=False,
                   delete_cache=(600, 3600)) as page:  # every 600 seconds uploads older than 3600
        session = gr.State(None)
        gr.Markdown(I18N("title"))
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(label=I18N("chat"), placeholder=I18N("nothing"), height=460,
                                  allow_tags=False, buttons=["copy"], feedback_options=None,
                                  layout="bubble", elem_id="chat")
                box = gr.MultimodalTextbox(
                    placeholder=I18N("box"), show_label=False, file_types=["image"],
                    file_count="multiple", sources=["upload"], autofocus=True, elem_id="box")
                with gr.Row():
                    stop, reset, looking = (gr.Button(I18N(name), elem_id=name)
                                            for name in ("stop", "reset", "look"))
                gr.Examples([{"text": text, "files": [file]} for text, file in examples], box,
                            label=I18N("examples"), api_visibility="private")
            with gr.Column(scale=1, min_width=260):
                model = gr.Dropdown(models.names(), label=I18N("model"), elem_id="model")
                settings = [gr.Slider(0, 2, 0, step=0.05, label=I18N("temperature")),
                            gr.Slider(0.05, 1, 1, step=0.05, label=I18N("top_p")),
                            gr.Slider(1, 1024, 256, step=1, label=I18N("longest"))]
        looks = gr.Image(label=I18N("looks"), format="png", interactive=False, visible=False,
                         buttons=["download", "fullscreen"], elem_id="looks")

        # One answer at a time: the machine has one model to compute with. Others wait in line.
        answering = box.submit(answer, [box, session, model, *settings], [chat, box, session],
                               concurrency_limit=1, show_progress="minimal", api_name="ask")
        stop.click(None, cancels=[answering], api_visibility="private")
        # The chat has a small button of its own that clears it: it must not clear the view alone.
        gr.on([reset.click, chat.clear], lambda: ([], None, None, nothing_seen), None,
              [chat, box, session, looks], cancels=[answering], api_name="reset")
        looking.click(look, session, looks, concurrency_limit=1, api_name="look")
        page.load(pick, None, model, api_visibility="private")
    return page
