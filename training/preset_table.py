"""The presets as plain data: whose models, what joins them, which data, how each stage trains.

    a name in PRESETS -> presets.py: flags that were not given take their values from here

Six of them are systems that people built by hand and wrote up. The models and files are named as
their authors published them; the numbers are theirs where they gave them, and where they did not
the comment says whose numbers stand in. Where a recipe was wrong, the comment says what it did and
this project does it right:

- a stage's last, smaller step is not thrown away, and a token weighs the same in every batch;
- the end of the turn, <|im_end|>, is supervised, so that the model learns to stop;
- SigLIP has no class token to drop: all patches are used, 729 of 27 x 27 and not 728.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""

    data: str | tuple  # a file, several to mix ("a.json:2": twice an epoch), or "emoji"
    learning_rate: float
    batch_size: int  # rows in a micro-batch, on each rank
    train_language: str  # "all", "none", "last:N", "first:N", "first:N+last:M"
    steps: int | None = None  # optimizer steps; None: `epochs` decides
    epochs: float = 1
    gradient_accumulation_steps: int = 1  # micro-batches in an optimizer step
    image_folder: str | None = None  # directory of the images; None: beside the file
    max_length: int = 512  # tokens in a row, image tokens included
    projector_learning_rate: float | None = None  # None: learning_rate
    vision_learning_rate: float | None = None  # None: learning_rate
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    dtype: str = "auto"  # or "bf16", "fp16", "fp32"
    gradient_checkpointing: bool = False  # blocks are computed again, to keep fewer activations
    save_steps: int = 500
    save_total_limit: int = 3
    train_projector: bool = True
    train_vision: bool = False
    lora: bool = False


@dataclass(frozen=True)
class Download:
    """A part of a preset's data, as it is published."""

    source: str  # a data set's name on the hub; or a web page, for what is fetched by hand
    files: tuple  # names there, "*" for any letters
    to: str  # directory that they are put into
    gigabytes: float | None  # 1e9 bytes, as published; None: the authors do not say
    unpack: str | None = None  # directory that an archive's images are unpacked into


@dataclass(frozen=True)
class Preset:
    """Two towers, what joins them, and the recipe of each stage."""

    language_model: str  # a directory, or a name on the hub
    vision_tower: str
    pretrain: Recipe
    sft: Recipe
    projector: str = "mlp"  # a key of PROJECTORS (model/projector.py)
    pixel_shuffle: int = 1
    vision_feature_layer: int = -1  # -1: the tower's last layer, -2: the one before it
    vision_feature_select: str = "patches"  # "class": the class token, "pooled": the mean
    template: str | None = None  # chat family; None: the language model's own family
    image_token: str | None = None  # holds an image token's place; None: the template's own
    system: str | None = None  # None: what the family's published template says; "": no system turn
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple = ("q_proj", "k_proj", "v_proj", "o_proj",
                           "gate_proj", "up_proj", "down_proj")
    downloads: tuple = ()  # of Download: for extras/download.py, no setting of a run


# The data.

# 1.27 million captions; the second file holds them too, and 1.4 million answers about images.
# Until December 2025 the hub had JSON Lines and zipped images in their place. Who has those:
# --data dataset/pretrain_data.jsonl --image_folder dataset/pretrain_images (and sft_...).
MINIMIND_PRETRAIN, MINIMIND_SFT = "dataset/pretrain_i2t.parquet", "dataset/sft_i2t.parquet"
MINIMIND_FILES = (
    Download("jingyaogong/minimind-v_dataset", ("pretrain_i2t.parquet",), "dataset", 4.33),
    Download("jingyaogong/minimind-v_dataset", ("sft_i2t.parquet",), "dataset", 4.93))

CC3M = "dataset/LLaVA-CC3M-Pretrain-595K"  # 595,000 captions
CC3M_FILES = Download("liuhaotian/LLaVA-CC3M-Pretrain-595K", ("chat.json", "images.zip"), CC3M,
                      6.67, unpack=f"{CC3M}/images")

# 118,000 photos; LLaVA's conversations name them as they lie in the archive.
COCO = "dataset/coco/train2017"
COCO_IMAGES = Download("http://images.cocodataset.org/zips/train2017.zip", ("train2017.zip",),
                       "dataset/coco", 19.3, unpack="dataset/coco")

AI_CHALLENGER = "dataset/ai_challenger/caption_train_images_20170902"  # five captions an image
AI_CHALLENGER_FILES = Download(
    "https://tianchi.aliyun.com/dataset/145781",
    ("*.jpg", "caption_train_annotations_20170902.json"), AI_CHALLENGER, None)


# Recipes that several presets begin with.

EMOJI = Recipe(data="emoji", learning_rate=2e-3, batch_size=24, train_language="none", steps=500,
               max_length=256, save_steps=100)
# The write-up's numbers for both stages: 3e-4, warmup 2 %, decay 0.01, batch 40, 8 epochs.
MINIMIND_DATA = Recipe(
    data=MINIMIND_PRETRAIN, learning_rate=3e-4, batch_size=40, train_language="none", epochs=8,
    warmup_ratio=0.02, save_total_limit=20)
# The projector's 1e-4 and, in stage two, 3e-5 for the adapters: both in one run of two epochs.
QWEN7B = Recipe(
    data=(f"{COCO}/detail_23k.json", f"{COCO}/complex_reasoning_77k.json",
          f"{AI_CHALLENGER}/caption_train_annotations_20170902.json"),
    learning_rate=1e-4, batch_size=4, train_language="none", max_length=1024, weight_decay=0.0,
    warmup_ratio=0.0, save_steps=1000, save_total_limit=5)
# The learning rates and batch sizes of LLaVA-1.5, because the write-up gives none.
CAPTIONS = Recipe(data=f"{CC3M}/chat.json", image_folder=f"{CC3M}/images", learning_rate=1e-3,
                  batch_size=32, gradient_accumulation_steps=8, train_language="none",
                  weight_decay=0.0)
# MiniMind-V trains in PyTorch's plain AdamW, along a cosine without warmup down to 10 %.
MINIMIND_V = Recipe(
    data=MINIMIND_PRETRAIN, learning_rate=4e-4, batch_size=16, train_language="none", epochs=4,
    max_length=640, warmup_ratio=0.0, save_steps=100)


PRESETS = {
    "emoji": Preset(
        language_model="dataset/emoji/language", vision_tower="dataset/emoji/vision",
        system="",  # the little language model has never read a system turn
        pretrain=EMOJI,
        sft=replace(EMOJI, learning_rate=1e-3, train_language="all", steps=600)),

    "smollm2-dinov2": Preset(
        language_model="HuggingFaceTB/SmolLM2-135M-Instruct", vision_tower="facebook/dinov2-small",
        # DINOv2's last layers are shaped by its own training task: the one before describes more.
        pixel_shuffle=2, vision_feature_layer=-2,
        pretrain=replace(MINIMIND_DATA, batch_size=8, epochs=1, learning_rate=1e-3),
        sft=replace(MINIMIND_DATA, data=MINIMIND_SFT, batch_size=8, epochs=1, train_language="all"),
        downloads=MINIMIND_FILES),

    # 196 image tokens; --projector linear is the write-up's other form.
    "qwen2.5-siglip": Preset(
        language_model="Qwen/Qwen2.5-0.5B", vision_tower="google/siglip-base-patch16-224",
        pretrain=MINIMIND_DATA,
        sft=replace(MINIMIND_DATA, data=MINIMIND_SFT, lora=True),
        downloads=MINIMIND_FILES),

    # 256 image tokens; --vision_tower google/siglip-so400m-patch14-384 makes 729 (the write-up
    # drops one, as if it were a class token). It trains projector and adapters in one run: that
    # is stage two here, and train_sft.py --model none goes without stage one, the projector alone.
    # The write-up supervises <|endoftext|> at the end, which its chat never looks for: <|im_end|>.
    "qwen7b-clip": Preset(
        language_model="Qwen/Qwen-7B-Chat", vision_tower="openai/clip-vit-large-patch14",
        template="qwen", image_token="<|extra_0|>", system="你是一位图像理解助手。",
        lora_rank=128, lora_alpha=32.0, lora_dropout=0.1,
        # Published as c_attn (q, k and v in one matrix), w1 and w2.
        lora_targets=("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"),
        pretrain=QWEN7B,
        sft=replace(QWEN7B, learning_rate=3e-5, projector_learning_rate=1e-4, lora=True, epochs=2),
        downloads=(
            Download("liuhaotian/LLaVA-Instruct-150K",
                     ("detail_23k.json", "complex_reasoning_77k.json"), COCO, 0.1),
            COCO_IMAGES, AI_CHALLENGER_FILES)),

    # 49 image tokens. Thinking is off: the answer is opened after an empty thought.
    "qwen3-clip": Preset(
        language_model="Qwen/Qwen3-0.6B", vision_tower="openai/clip-vit-base-patch32",
        template="qwen3",
        lora_rank=8, lora_alpha=16.0, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        pretrain=replace(CAPTIONS, warmup_ratio=0.05),
        sft=Recipe(data="dataset/llava-instruct-mix/data/train-*.parquet", learning_rate=2e-4,
                   projector_learning_rate=2e-5, batch_size=8, gradient_accumulation_steps=16,
                   train_language="none", lora=True, max_length=1024, weight_decay=0.0,
                   warmup_ratio=0.05),
        downloads=(CC3M_FILES,
                   Download("trl-lib/llava-instruct-mix", ("data/train-*.parquet",),
                            "dataset/llava-instruct-mix", None))),

    # 256 image tokens, or one with --vision_feature_select class or pooled. The write-up trains on
    # 4 V100s of 32 GB: in fp16 with a gradient scaler, which is what "auto" picks on such cards,
    # with accumulation and checkpointing. Stage two holds 26 GB of weights, gradients and averages
    # on each card: --parallel fsdp gives each a quarter. The write-up does not name its files;
    # captions and conversations of the same kind stand here.
    "qwen2.5-1.5b-clip": Preset(
        language_model="Qwen/Qwen2.5-1.5B-Instruct", vision_tower="openai/clip-vit-large-patch14",
        template="qwen2.5-instruct",
        pretrain=replace(CAPTIONS, batch_size=8, gradient_checkpointing=True),
        sft=Recipe(data=f"{COCO}/llava_instruct_150k.json", learning_rate=2e-5, batch_size=4,
                   gradient_accumulation_steps=8, train_language="all", max_length=1024,
                   weight_decay=0.0, gradient_checkpointing=True),
        downloads=(CC3M_FILES,
                   Download("liuhaotian/LLaVA-Instruct-150K", ("llava_instruct_150k.json",), COCO,
                            0.229),
                   COCO_IMAGES)),

    # 196 image tokens, written as 196 times "@". The author's .pth works as well: --language_model
    # with a directory that holds llm_512.pth (MiniMind2: llm_768.pth) and the tokenizer's files.
    "minimind-v": Preset(
        language_model="jingyaogong/MiniMind2-Small", vision_tower="openai/clip-vit-base-patch16",
        projector="linear", template="minimind2", image_token="@",
        # As published; --train_language none trains the projector alone.
        pretrain=replace(MINIMIND_V, train_language="last:1"),
        sft=replace(MINIMIND_V, data=MINIMIND_SFT, learning_rate=1e-6, batch_size=4,
                    train_language="all", epochs=2, max_length=1536),
        downloads=MINIMIND_FILES),

    # 64 image tokens, <|image_pad|>. For stage two the author's README writes 5e-5, the training
    # script 5e-6: what ran counts.
    "minimind-3v": Preset(
        language_model="jingyaogong/minimind-3", vision_tower="jingyaogong/siglip2-base-p32-256-ve",
        projector="norm_mlp", template="minimind",
        pretrain=replace(MINIMIND_V, epochs=2, max_length=450),
        # The first layer is the first to meet image tokens, the last one shapes the answer; what
        # lies between keeps what the little model knows of language.
        sft=replace(MINIMIND_V, data=MINIMIND_SFT, learning_rate=5e-6, batch_size=4,
                    train_language="first:1+last:1", epochs=2, max_length=768, save_steps=1000),
        downloads=MINIMIND_FILES),
}
