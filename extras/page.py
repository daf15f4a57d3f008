"""The page to talk to a model: components of gradio, and what happens when one is used.

    a browser's session -> Session (its own Conversation) -> reply, piece by piece -> the page
    runs under --out    -> Models -> the one that is picked, loaded once

What was said lives in the session's state on the server, which gradio finds by a random key that
each open page draws for itself; the model's weights are the only thing that sessions share. The
browser sends text and images, and no history that it could make up.
"""

import html
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from extras.attention import draw_attention
from extras.upload_guard import OWN, new_file
from model.pretrained.checkpoint import checkpoints, newest_checkpoint
from training.inference import Conversation, load_model

MAX_LOADED = 2  # models; sessions that pick others in turn would load them again and again
PAUSE = 0.1  # seconds between two updates of a growing answer: for each, gradio reads all images
MAX_IMAGES, MAX_CHARACTERS = 8, 4000  # of one message
EXAMPLES = ((1003, "What do you see?"), (1003, "右下角是什么？"), (8, "How many things are there?"))
# Gradio's own buttons below what a person said: one of them shares it on the internet.
CSS = ".message-buttons-right { display: none !important; }"
FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
# {component: {property: text}}, and the texts that stand by themselves
TEXTS = {
    "English": {
        "title": {"value": "## Show it an image and talk about it"},
        "chat": {"label": "Conversation", "placeholder": "Nothing was said yet."},
        "box": {"placeholder": "Drop images here, then ask"},
        "stop": {"value": "Stop"}, "reset": {"value": "New conversation"},
        "look": {"value": "Where did it look?"}, "examples": {"label": "Examples"},
        "model": {"label": "Model"}, "refresh": {"value": "Look for new models"},
        "temperature": {"label": "Temperature (0: always the likeliest token)"},
        "top_p": {"label": "Top p (draw from the likeliest tokens that reach this share)"},
        "longest": {"label": "Longest answer, in tokens"},
        "caption": {"value": "### Where it looked for each word, and what each image token stands "
                             "for"},
        "question": "What do you see?", "no_answer": "There is no answer yet to look at."},
    "中文": {
        "title": {"value": "## 给它看图，和它对话"},
        "chat": {"label": "对话", "placeholder": "还没有对话。"},
        "box": {"placeholder": "把图片拖到这里，然后提问"},
        "stop": {"value": "停止"}, "reset": {"value": "新对话"},
        "look": {"value": "它在看哪里？"}, "examples": {"label": "示例"},
        "model": {"label": "模型"}, "refresh": {"value": "查找新模型"},
        "temperature": {"label": "温度（0：总是取最可能的词元）"},
        "top_p": {"label": "Top p（从累计达到此概率的最可能的词元中抽取）"},
        "longest": {"label": "回答的最大长度（词元数）"},
        "caption": {"value": "### 每个词看的是图中何处，以及每个图像词元最接近的词"},
        "question": "你看到了什么？", "no_answer": "还没有回答可以查看。"}}
ENGLISH, CHINESE = TEXTS
LABELLED = [name for name, text in TEXTS[ENGLISH].items() if isinstance(text, dict)]


def preferred(header: str | None) -> str:
    """A browser's Accept-Language -> the page's language."""
    return CHINESE if (header or "").strip().lower().startswith("zh") else ENGLISH


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
        self.flags, self.loaded, self.lock = flags, {}, threading.Lock()

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
        with self.lock:
            if name not in self.loaded:
                while len(self.loaded) >= MAX_LOADED:
                    del self.loaded[next(iter(self.loaded))]
                self.loaded[name] = load_model(self.flags, name)
            return self.loaded[name]


def respond(models: Models, said: dict, session: Session | None, name: str, sampling: dict,
            locale: str):
    """Yield (what the chat shows, what stands in the box, session), again and again as text comes.

    said: {"text", "files"} of the box; it stays there, and a warning is shown, when it cannot be
    answered. sampling: temperature, top_p and max_new_tokens.
    """
    files = said.get("files") or []
    text = (said.get("text") or "").strip() or (TEXTS[locale]["question"] if files else "")
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
            if time.monotonic() - updated > PAUSE:
                turns = [*before, {"role": "assistant", "content": answer}]
                yield turns, None, session
                updated = time.monotonic()
        session.turns = turns = [*before, {"role": "assistant", "content": answer}]
        yield turns, None, session
    except GeneratorExit:  # stopped: the answer so far is remembered, so it stays shown
        session.turns = turns
        raise
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


def attention_image(session: Session | None, locale: str):
    """Where the model looked for the last answer -> a figure; None, and a warning says why."""
    if session is None or not session.conversation.answer_ids:
        warn(TEXTS[locale]["no_answer"])
        return None
    try:
        return draw_attention(session.conversation)
    except ValueError as error:
        warn(str(error).removeprefix("--attention: "))
        return None


def scenes(directory: Path) -> list[dict]:
    """Example questions about unseen scenes of the emoji world, written to the directory."""
    from dataset.emoji.world import TEST_START, picture, scene

    directory.mkdir(exist_ok=True)
    examples = []
    for number, question in EXAMPLES:
        file = directory / f"scene_{number}.png"
        picture(scene(TEST_START + number)).save(file)
        examples.append({"text": question, "files": [str(file)]})
    return examples


def components(models: Models, directory: Path) -> dict:
    """{name: component}, laid out on the page. directory: where the example images may lie."""
    c, names = {"session": gr.State(None)}, models.names()

    def text(name: str) -> dict:
        return {"elem_id": name, **TEXTS[ENGLISH][name]}

    with gr.Row():
        c["title"] = gr.Markdown(**text("title"))
        c["language"] = gr.Radio([ENGLISH, CHINESE], value=ENGLISH, show_label=False, scale=0,
                                 container=False, elem_id="language", min_width=250)
    with gr.Row():
        with gr.Column(scale=3):
            c["chat"] = gr.Chatbot(**text("chat"), height=460, allow_tags=False, buttons=["copy"],
                                   feedback_options=None, layout="bubble")
            c["box"] = gr.MultimodalTextbox(**text("box"), show_label=False, file_types=["image"],
                                            file_count="multiple", sources=["upload"],
                                            autofocus=True)
            with gr.Row():
                for name in ("stop", "reset", "look"):
                    c[name] = gr.Button(**text(name))
            c["examples"] = gr.Examples(scenes(directory), c["box"], **text("examples"),
                                        api_visibility="private").dataset
        with gr.Column(scale=1, min_width=260):
            c["model"] = gr.Dropdown(names, value=names[0] if names else None, **text("model"))
            c["refresh"] = gr.Button(**text("refresh"), size="sm")
            c["temperature"] = gr.Slider(0, 2, 0, step=0.05, **text("temperature"))
            c["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, **text("top_p"))
            c["longest"] = gr.Slider(1, 1024, 256, step=1, **text("longest"))
    with gr.Column(visible=False) as c["below"]:
        c["caption"] = gr.Markdown(**text("caption"))
        c["looks"] = gr.Image(show_label=False, format="png", elem_id="looks", interactive=False,
                              buttons=["download", "fullscreen"])
    return c


def build(models: Models, directory: Path) -> gr.Blocks:
    """directory: where the example images may lie."""
    def answer(said, session, name, temperature, top_p, longest, language):
        sampling = {"temperature": float(temperature), "top_p": float(top_p),
                    "max_new_tokens": int(longest)}
        yield from respond(models, said, session, name, sampling, language)

    def look(session, locale, request: gr.Request):
        image = attention_image(session, locale)
        if image is None:
            return None, gr.update(visible=False)
        # By default it would lie where everyone's does; it shows what one session uploaded.
        file = new_file(request.request.scope[OWN], "looks.png")
        image.savefig(file, dpi=100)
        return str(file), gr.update(visible=True)

    def labels(locale):
        return [gr.update(**TEXTS[locale][name]) for name in LABELLED]

    def arrive(request: gr.Request):
        locale = preferred(request.headers.get("accept-language"))
        return [locale, *labels(locale)]

    with gr.Blocks(title="Afternoon VLM", analytics_enabled=False,
                   delete_cache=(600, 3600)) as page:  # every 600 seconds uploads older than 3600
        c = components(models, directory)

        def of(*names: str) -> list:
            return [c[name] for name in names]

        # One answer at a time: the machine has one model to compute with. Others wait in line.
        answering = c["box"].submit(
            answer, of("box", "session", "model", "temperature", "top_p", "longest", "language"),
            of("chat", "box", "session"), concurrency_limit=1, show_progress="minimal",
            api_name="ask")
        c["stop"].click(None, cancels=[answering], api_visibility="private")
        # The chat has a small button of its own that clears it: it must not clear the view alone.
        gr.on([c["reset"].click, c["chat"].clear],
              lambda: ([], None, None, None, gr.update(visible=False)), None,
              of("chat", "box", "session", "looks", "below"), cancels=[answering], api_name="reset")
        c["look"].click(look, of("session", "language"), of("looks", "below"), concurrency_limit=1,
                        api_name="look")
        c["refresh"].click(lambda: gr.update(choices=models.names()), None, c["model"],
                           api_visibility="private")
        c["language"].change(labels, c["language"], of(*LABELLED), api_visibility="private")
        page.load(arrive, None, of("language", *LABELLED), api_visibility="private")
    return page
