"""The page of a model on the hub: run.json -> README.md.

    checkpoint (config.json, run.json) + scores.json beside it -> model_card -> text
                metrics.jsonl beside it -> extras/export draws loss.png, the text shows it

It says what is known and nothing else: a licence that is not in the table below is "not known
here". Of files and directories only the last name is told: where they lie concerns nobody.
"""

import json
from pathlib import Path

from model.pretrained.checkpoint import read_config, read_run

# As known when this was written: check the page before you publish. Others are not listed here.
LICENCES = {
    "Qwen/Qwen2.5-0.5B": "apache-2.0", "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-1.5B-Instruct": "apache-2.0", "Qwen/Qwen3-0.6B": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "google/siglip-base-patch16-224": "apache-2.0",
    "google/siglip2-base-patch16-224": "apache-2.0",
    "google/siglip-so400m-patch14-384": "apache-2.0",
    "facebook/dinov2-small": "apache-2.0", "facebook/dinov2-base": "apache-2.0",
    "dataset/emoji/language": "apache-2.0", "dataset/emoji/vision": "apache-2.0"}

CURVE = "loss.png"

USES = {
    "transformers": """\
```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")
turn = {{"role": "user", "content": "<image>\\nWhat is in the picture?"}}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
asked = processor(text=text, images=Image.open("cat.jpg"), return_tensors="pt").to(model.dtype)
answer = model.generate(**asked, max_new_tokens=64)[0, asked["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```
""",
    "merged": """\
With the code that trained it (a directory is all that it needs):

```bash
python -c "from huggingface_hub import snapshot_download as get; get('{name}', local_dir='model')"
python eval.py --model model --image cat.jpg --prompt "What is in the picture?"
```

`python -m extras.export --model model --to transformers --out llava` makes a directory for
transformers.
""",
    "peft": """\
The adapters of the language model alone, without the projector that lets it see:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
```

In training here: `--lora_from DIR`.
"""}


def model_card(checkpoint: Path, form: str, name: str) -> str:
    """form: "transformers", "merged" or "peft". name: USER/NAME on the hub."""
    config, run = read_config(checkpoint), read_run(checkpoint)
    settings = run["settings"]
    bases = {part: public_name(reference["name"]) for part, reference in config["bases"].items()}
    on_hub = [base for base in bases.values() if base.count("/") == 1]
    facts = ["---", f"library_name: {'peft' if form == 'peft' else 'transformers'}",
             "pipeline_tag: " + ("text-generation" if form == "peft" else "image-text-to-text")]
    if on_hub:
        facts += ["base_model:", *(f"- {base}" for base in on_hub)]
    lines = [*facts, "---", "", f"# {name.split('/')[-1]}", "",
             "A vision-language model: a vision tower, a projector and a language model, trained "
             f"in plain PyTorch (preset `{settings['preset']}`).", "",
             "| part | from | its licence |", "| --- | --- | --- |"]
    lines += [f"| {part} | {base} | {LICENCES.get(base, 'not known here: see its page')} |"
              for part, base in bases.items()]
    lines += ["", f"The projector (`{config['projector']}`, {config['image_tokens']} tokens for a "
              "picture) is new.", "", "## Training", "",
              f"Stage `{run['stage']}`, {run['step']:,} optimizer steps of "
              f"{settings['batch_size'] * settings['accumulate'] * run['processes']} samples, "
              f"peak learning rate {settings['learning_rate']:g}, "
              f"{how_language(settings)}. Data: {told_data(run['data'])}.", ""]
    if metrics_of(checkpoint):
        lines += [f"![The loss of each step]({CURVE})", ""]
    lines += score_lines(checkpoint)
    base = bases.get("language", "the language model")
    lines += ["## Use", "", USES[form].format(name=name, base=base)]
    return "\n".join(lines)


def public_name(name: str) -> str:
    """A name on the hub, or of the embedded towers, as it is; of any other directory its last."""
    if name in LICENCES or (name.count("/") == 1 and not name.startswith((".", "/"))
                            and not Path(name).exists()):
        return name
    return Path(name).name


def how_language(settings: dict) -> str:
    if settings["lora"]:
        return f"LoRA of rank {settings['lora_rank']} in the language model"
    return f"trained of the language model: {settings['train_language']}"


def told_data(data: dict) -> str:
    files = data.get("files") or [data]
    return ", ".join(f"`{Path(about['file']).name}`" for about in files) + (
        f" ({data['samples']:,} samples)")


def metrics_of(checkpoint: Path) -> Path | None:
    """What the run wrote at each step, if the checkpoint still lies in its run."""
    file = checkpoint.parent / "metrics.jsonl"
    return file if file.is_file() else None


def score_lines(checkpoint: Path) -> list[str]:
    """The shares in scores.json of the run, or of the directory that the run lies in."""
    places = [directory / "scores.json" for directory in (
        checkpoint, checkpoint.parent, checkpoint.parent.parent)]
    found = [place for place in places if place.is_file()]
    if not found:
        return []
    scores = json.loads(found[0].read_text(encoding="utf-8"))
    shares = {name: share for name, share in scores.items() if isinstance(share, (int, float))}
    return ["## Scores", "", "Share of answers that are exactly right, on unseen questions.", "",
            "| | exactly right |", "| --- | --- |",
            *(f"| {name} | {share:.1%} |" for name, share in shares.items()), ""]
