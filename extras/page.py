"""The page to talk to a model: components of gradio, and what happens when one is used.

    a browser's session -> Talk (its own Conversation) -> reply, piece by piece -> the page
    runs under --out -> Models -> the one that is picked, loaded once

What was said lives in the session's state on the server, which gradio finds by a random key that
each open page draws for itself; the model's weights are the only thing that sessions share. The
browser sends words and pictures, and no history that it could make up.
"""

import html
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from extras.attention import draw_looks
from extras.page_texts import LANGUAGES, TEXTS, preferred
from extras.upload_guard import OWN, new_file
from model.pretrained.checkpoint import checkpoints, newest_checkpoint
from training.inference import Conversation, load_model

KEPT = 2  # loaded models; sessions that pick others in turn would load them again and again
PAUSE = 0.1  # seconds between two looks of a growing answer: for each, gradio reads all pictures
MOST_PICTURES = 8  # with one thing said
LONGEST = 4000  # characters of one thing said
EXAMPLES = ((1003, "What do you see?"), (1003, "右下角是什么？"), (8, "How many things are there?"))
# Gradio's own buttons below what a person said: one of them shares it on the internet.
CSS = ".message-buttons-right { display: none !important; }"
FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]


@dataclass
class Talk:
    """What one open page has said and seen."""

    name: str  # of its model
    conversation: Conversation
    shown: list = field(default_factory=list)  # as gr.Chatbot wants it


class Models:
    """The runs below a directory, newest first, and the few that are loaded."""

    def __init__(self, flags):
        """flags: model, out, and what loading.load reads."""
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
                while len(self.loaded) >= KEPT:
                    del self.loaded[next(iter(self.loaded))]
                self.loaded[name] = load_model(self.flags, name)
            return self.loaded[name]


def respond(models: Models, said: dict, talk: Talk | None, name: str, temperature: float,
            top_p: float, max_new_tokens: float, language: str):
    """Yield (what the chat shows, what stands in the box, talk), again and again as words come.

    said: {"text", "files"} of the box. What cannot be done is told in a sentence, and the words
    stay in the box.
    """
    files = said.get("files") or []
    text = (said.get("text") or "").strip() or (TEXTS[language]["question"] if files else "")
    if not text:
        yield talk.shown if talk else [], None, talk
        return
    try:
        if len(files) > MOST_PICTURES or len(text) > LONGEST:
            raise ValueError(f"{len(files)} pictures and {len(text):,} characters at once: at most "
                             f"{MOST_PICTURES} and {LONGEST:,} are taken")
        if talk is None or talk.name != name:
            talk = Talk(name, Conversation(*models.get(name), {}))
        talk.conversation.sampling.update(temperature=float(temperature), top_p=float(top_p),
                                          max_new_tokens=int(max_new_tokens))
        show(talk.conversation, files)
        asked = [*({"role": "user", "content": {"path": file}} for file in files),
                 {"role": "user", "content": text}]
        answer, told = "", float("-inf")
        # The words stay in the box until the first of the answer: only then is nothing wrong.
        for piece in talk.conversation.reply(text):
            answer += piece
            if time.monotonic() - told > PAUSE:
                shown = [*talk.shown, *asked, {"role": "assistant", "content": answer}]
                yield shown, None, talk
                told = time.monotonic()
        talk.shown = shown = [*talk.shown, *asked, {"role": "assistant", "content": answer}]
        yield talk.shown, None, talk
    except GeneratorExit:  # stopped: what was said until then is remembered, so it stays shown
        talk.shown = shown
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        tell(str(error))
        yield talk.shown if talk else [], said, talk


def tell(sentence: str) -> None:
    """In a corner of the page. It would show HTML, and a file may have any name."""
    gr.Warning(html.escape(sentence), duration=15, title="")


def show(conversation: Conversation, files: list) -> None:
    """All of them or none. A path on this machine is nobody's business: its name alone is told."""
    conversation.waiting = []
    for file in files:
        try:
            conversation.show(file)
        except (OSError, ValueError) as error:
            conversation.waiting = []
            raise ValueError(str(error).replace(str(file), Path(file).name)) from error


def looked(talk: Talk | None, language: str):
    """-> the picture of where the last answer's words were looked for, and whether there is one;
    if there is none, a sentence tells why."""
    if talk is None or not talk.conversation.answer_ids:
        tell(TEXTS[language]["no_answer"])
        return None, gr.update(visible=False)
    try:
        return draw_looks(talk.conversation), gr.update(visible=True)
    except ValueError as error:
        tell(str(error).removeprefix("--attention: "))
        return None, gr.update(visible=False)


def scenes(directory: Path) -> list[dict]:
    """Example questions about unseen pictures of the emoji world, written to the directory."""
    from dataset.emoji.world import TEST_START, picture, scene

    directory.mkdir(exist_ok=True)
    examples = []
    for number, question in EXAMPLES:
        file = directory / f"scene_{number}.png"
        picture(scene(TEST_START + number)).save(file)
        examples.append({"text": question, "files": [str(file)]})
    return examples


def build(models: Models, directory: Path) -> gr.Blocks:
    """directory: where the example pictures may lie."""
    words = TEXTS[LANGUAGES[0]]
    with gr.Blocks(title="Afternoon VLM", analytics_enabled=False,
                   delete_cache=(600, 3600)) as page:  # seconds: uploaded pictures do not pile up
        talk = gr.State(None)
        with gr.Row():
            title = gr.Markdown(words["title"])
            language = gr.Radio(LANGUAGES, value=LANGUAGES[0], show_label=False, container=False,
                                elem_id="language", min_width=250, scale=0)
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(label=words["chat"], height=460, elem_id="chat",
                                  placeholder=words["nothing"], allow_tags=False, buttons=["copy"],
                                  feedback_options=None, layout="bubble")
                box = gr.MultimodalTextbox(placeholder=words["placeholder"], show_label=False,
                                           file_types=["image"], file_count="multiple",
                                           sources=["upload"], elem_id="box", autofocus=True)
                with gr.Row():
                    stop = gr.Button(words["stop"], elem_id="stop")
                    reset = gr.Button(words["reset"], elem_id="reset")
                    look = gr.Button(words["look"], elem_id="look")
                examples = gr.Examples(scenes(directory), box, label=words["examples"],
                                       elem_id="examples", api_visibility="private")
            with gr.Column(scale=1, min_width=260):
                names = models.names()
                model = gr.Dropdown(names, value=names[0] if names else None, label=words["model"],
                                    elem_id="model")
                refresh = gr.Button(words["refresh"], size="sm")
                temperature = gr.Slider(0, 2, 0, step=0.05, label=words["temperature"])
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label=words["top_p"])
                longest = gr.Slider(1, 1024, 256, step=1, label=words["max_new_tokens"])
        with gr.Column(visible=False) as below:
            caption = gr.Markdown(f"### {words['looks']}")
            looks = gr.Image(show_label=False, format="png", elem_id="looks", interactive=False,
                             buttons=["download", "fullscreen"])

        def answer(said, talk, name, temperature, top_p, longest, language):
            yield from respond(models, said, talk, name, temperature, top_p, longest, language)

        def labels(language):
            w = TEXTS[language]
            return [w["title"], gr.update(label=w["chat"], placeholder=w["nothing"]),
                    gr.update(placeholder=w["placeholder"]), w["stop"], w["reset"], w["look"],
                    gr.update(label=w["model"]), w["refresh"], gr.update(label=w["temperature"]),
                    gr.update(label=w["top_p"]), gr.update(label=w["max_new_tokens"]),
                    f"### {w['looks']}", gr.update(label=w["examples"])]

        def look_there(talk, language, request: gr.Request):
            picture, visible = looked(talk, language)
            if picture is None:
                return None, visible
            # Left to gradio it would lie where everyone's does; it shows what one session uploaded.
            file = new_file(request.request.scope[OWN], "looks.png")
            picture.save(file)
            return str(file), visible

        def arrive(request: gr.Request):
            chosen = preferred(request.headers.get("accept-language"))
            return [chosen, *labels(chosen)]

        labelled = [title, chat, box, stop, reset, look, model, refresh, temperature, top_p,
                    longest, caption, examples.dataset]
        # One answer at a time: the machine has one model to compute with. Others wait in line.
        asked = box.submit(answer, [box, talk, model, temperature, top_p, longest, language],
                           [chat, box, talk], concurrency_limit=1, show_progress="minimal",
                           api_name="ask")
        stop.click(None, cancels=[asked], api_visibility="private")
        # The chat has a small button of its own that clears it: it must not clear the view alone.
        gr.on([reset.click, chat.clear],
              lambda: ([], None, None, None, gr.update(visible=False)), None,
              [chat, box, talk, looks, below], cancels=[asked], api_name="reset")
        look.click(look_there, [talk, language], [looks, below], concurrency_limit=1,
                   api_name="look")
        refresh.click(lambda: gr.update(choices=models.names()), None, model,
                      api_visibility="private")
        language.change(labels, language, labelled, api_visibility="private")
        page.load(arrive, None, [language, *labelled], api_visibility="private")
    return page
