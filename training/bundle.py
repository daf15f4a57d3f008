"""A model together with what turns text and images into its inputs.

    towers, projector, template, image processor -> ModelBundle -> training, checkpoints
    a checkpoint -> load_bundle -> the same again
"""

from dataclasses import dataclass, replace

from dataset.chat import ChatTemplate
from dataset.families import DEFAULT_SYSTEM
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from model.pretrained.checkpoint import base_reference, own_names, read_config, tensor_names
from model.pretrained.hub import TOWER_SETTINGS
from model.pretrained.load import load_checkpoint
from model.pretrained.public_config import write_vlm_config
from model.vlm import VLM


@dataclass
class ModelBundle:
    model: VLM
    template: ChatTemplate
    processor: ImageProcessor
    config: dict  # config.json of the checkpoints to come
    changed: set  # names of the parameters that differ from the public weights already

    def saved_names(self) -> set[str]:
        """Parameters that a checkpoint holds: all that differ from the public weights by now."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return self.changed | trained | set(own_names(self.model))


def load_bundle(checkpoint, settings) -> ModelBundle:
    """The model of a checkpoint, its weights in the dtype of their files.

    --language_model and --vision_tower say where its public towers lie now, if not where they were.
    """
    config = read_config(checkpoint)
    bases = config["bases"]
    names = {part: getattr(settings, TOWER_SETTINGS[part]) for part in bases}
    moved = {part: None if name == bases[part]["name"] else name for part, name in names.items()}
    model = load_checkpoint(checkpoint, None, **moved)
    for part, reference in bases.items():
        name = moved[part] or (reference.get("copied") and str(checkpoint / part))
        bases[part] = {"name": name or reference["name"], "sha256": reference["sha256"]}
    template, processor = make_inputs(settings, model.language.config, model.vision.config,
                                      checkpoint, checkpoint)
    # With another template the placeholder may be another id.
    model.config = replace(model.config, image_token_id=template.image_token_id)
    config = checkpoint_config(model, template, settings, bases, config["lora"])
    return ModelBundle(model, template, processor, config, tensor_names(checkpoint))


def make_inputs(settings, language_config, vision_config, language_directory, vision_directory):
    """-> the chat template and the image processor that belong to the towers."""
    tokenizer = Tokenizer.from_directory(language_directory)
    processor = ImageProcessor.from_directory(vision_directory)
    if settings.approximate_resize is not None:
        processor = replace(processor, fast=settings.approximate_resize)
    family = settings.template or language_config.model_type
    system = DEFAULT_SYSTEM[family] if settings.system is None else settings.system
    K = image_tokens(vision_config.patch_size, processor.size, settings.pixel_shuffle,
                     settings.vision_feature_select)
    return ChatTemplate(tokenizer, K, system or None, settings.image_token, family), processor


def public_bases(settings) -> dict:
    """What a checkpoint says about the public towers that it stands on."""
    return {part: base_reference(getattr(settings, name)) for part, name in TOWER_SETTINGS.items()}


def checkpoint_config(model, template, settings, bases: dict, lora: dict | None) -> dict:
    """config.json of a checkpoint."""
    return {
        **write_vlm_config(model.config), "image_tokens": template.image_tokens,
        "template": template.family, "image_token": template.image_token,
        "system": template.default_system, "lora": lora, "bases": bases}


def embedding_rms(language) -> float:
    """The root mean square of the first token embeddings, so that image tokens begin with the
    same. Numbers that are not finite are left out: the loop reports such weights."""
    table = language.embed_tokens.weight[:4096].float()
    return table[table.isfinite()].square().mean().sqrt().item()


def image_tokens(patch_size: int, size: tuple[int, int], pixel_shuffle: int,
                 features: str = "patches") -> int:
    """K, for the size (H,W) that the image processor makes.

    Not for the size in the tower's config: DINOv2 was trained on 518 pixels and published with a
    processor that makes 224; its position grid is stretched to what comes in.
    """
    if features != "patches":  # one vector for the whole image
        if pixel_shuffle > 1:
            raise ValueError(f"--vision_feature_select {features} makes one token of an image, so "
                             f"there is "
                             f"nothing for --pixel_shuffle {pixel_shuffle} to join")
        return 1
    rows, columns = size[0] // patch_size, size[1] // patch_size
    return rows * columns // pixel_shuffle**2
