"""A model together with what turns text and images into its inputs.

    towers, projector, template, image processor -> ModelBundle -> training, checkpoints
    a checkpoint -> load_bundle -> the same again
"""

from dataclasses import dataclass, field, replace

from dataset.chat import ChatTemplate
from dataset.families import DEFAULT_SYSTEM
from dataset.images import ImageProcessor
from dataset.readers.published_template import chat_facts
from dataset.tokenizer import Tokenizer
from model.pretrained.checkpoint import own_names, read_config, tensor_names
from model.pretrained.hub import TOWER_SETTINGS
from model.pretrained.load import load_checkpoint
from model.pretrained.public_config import write_vlm_config
from model.vlm import VLM


@dataclass
class ModelBundle:
    model: VLM
    template: ChatTemplate
    processor: ImageProcessor
    bases: dict  # {part: name and sha256 of the public tower that it stands on}
    lora: dict | None = None  # settings of its adapters
    changed: set = field(default_factory=set)  # parameters that differ from the public weights

    @property
    def config(self) -> dict:
        """config.json of its checkpoints."""
        template = self.template
        return {**write_vlm_config(self.model.config), "image_tokens": template.image_tokens,
                "template": template.family, "image_token": template.image_token,
                "system": template.default_system, "lora": self.lora, "bases": self.bases}

    def saved_names(self) -> set[str]:
        """Parameters that a checkpoint holds: all that differ from the public weights by now."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return self.changed | trained | set(own_names(self.model))


def load_bundle(checkpoint, settings) -> ModelBundle:
    """The model of a checkpoint, its weights in the dtype of their files. --language_model and
    --vision_tower say where its public towers lie now, if not where they were."""
    config, moved = read_config(checkpoint), {}
    bases = config["bases"]
    for part, reference in bases.items():
        name = getattr(settings, TOWER_SETTINGS[part])
        moved[part] = None if name == reference["name"] else name
        copied = reference.pop("copied", False) and str(checkpoint / part)
        reference["name"] = moved[part] or copied or reference["name"]
    model = load_checkpoint(checkpoint, None, **moved)
    template, processor = make_inputs(settings, model.language.config, model.vision.config,
                                      checkpoint, checkpoint)
    # With another template the placeholder may be another id.
    model.config = replace(model.config, image_token_id=template.image_token_id)
    return ModelBundle(model, template, processor, bases, config["lora"], tensor_names(checkpoint))


def make_inputs(settings, language_config, vision_config, language_directory, vision_directory):
    """-> the chat template and the image processor that belong to the towers."""
    tokenizer = Tokenizer.from_directory(language_directory)
    processor = ImageProcessor.from_directory(vision_directory)
    if settings.approximate_resize is not None:
        processor = replace(processor, fast=settings.approximate_resize)
    if settings.template:
        family, system = settings.template, DEFAULT_SYSTEM[settings.template]
    else:
        family, system = chat_facts(tokenizer, language_config.model_type)
    system = system if settings.system is None else settings.system
    # K follows from the size that the processor makes, not from the one in the tower's config:
    # DINOv2 was trained on 518 pixels and published with a processor that makes 224; its position
    # grid is stretched to what comes in.
    rows, columns = (side // vision_config.patch_size for side in processor.size)
    if rows % settings.pixel_shuffle or columns % settings.pixel_shuffle:
        raise ValueError(f"--pixel_shuffle {settings.pixel_shuffle}: an image makes {rows} x "
                         f"{columns} patches, which no squares of that side fill; give a number "
                         "that divides both")
    K = rows * columns // settings.pixel_shuffle**2
    if settings.vision_feature_select != "patches":  # one vector for the whole image
        K = 1
        if settings.pixel_shuffle > 1:
            raise ValueError(f"--vision_feature_select {settings.vision_feature_select} makes one "
                             "token of an image, so there is nothing for --pixel_shuffle "
                             f"{settings.pixel_shuffle} to join")
    template = ChatTemplate(tokenizer, K, system or None, settings.image_token, family)
    check_vocabulary(template, language_config.vocab_size)
    return template, processor


def check_vocabulary(template: ChatTemplate, rows: int) -> None:
    """ValueError when the tokenizer has ids that the embedding table has no rows for, other than
    the image placeholder, which is never looked up. A GPU would stop with a device-side assert."""
    tokens = {id: token for token, id in template.tokenizer.backend.get_vocab().items()
              if id >= rows and id != template.image_token_id}
    if tokens:
        listed = ", ".join(repr(tokens[id]) for id in sorted(tokens)[:4])
        listed += " and more" if len(tokens) > 4 else ""
        raise ValueError(
            f"the tokenizer has {template.tokenizer.vocab_size:,} tokens, the embedding table "
            f"{rows:,} rows: there is none for {listed}. Take the tokenizer of the same release, "
            "or add the rows with transformers (model.resize_token_embeddings("
            f"{max(tokens) + 1})) and train them (--train_language all)")


def embedding_rms(language) -> float:
    """The root mean square of the first token embeddings, so that image tokens begin with the
    same. Numbers that are not finite are left out: the loop reports such weights."""
    table = language.embed_tokens.weight[:4096].float()
    return table[table.isfinite()].square().mean().sqrt().item()
