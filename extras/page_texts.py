"""What the page says, in English and in Chinese: the same names in both."""

TEXTS = {
    "English": {
        "title": "## Show it a picture and talk about it",
        "chat": "Conversation", "placeholder": "Drop pictures here, then ask",
        "nothing": "Nothing was said yet.", "stop": "Stop", "reset": "New conversation",
        "look": "Where did it look?", "looks": "Where it looked for each word, and what each image "
        "token stands for", "model": "Model", "refresh": "Look for new models",
        "settings": "Answers", "temperature": "Temperature (0: always the likeliest word)",
        "top_p": "Top p (draw from the likeliest words that reach this share)",
        "max_new_tokens": "Longest answer, in tokens", "examples": "Examples",
        "question": "What do you see?", "busy": "Wait for the answer, or stop it.",
        "no_answer": "There is no answer yet to look at.",
    },
    "中文": {
        "title": "## 给它看图，和它对话",
        "chat": "对话", "placeholder": "把图片拖到这里，然后提问",
        "nothing": "还没有对话。", "stop": "停止", "reset": "新对话",
        "look": "它在看哪里？", "looks": "每个词看的是图中何处，以及每个图像词元最接近的词",
        "model": "模型", "refresh": "查找新模型",
        "settings": "回答", "temperature": "温度（0：总是取最可能的词）",
        "top_p": "Top p（从累计达到此概率的最可能的词中抽取）",
        "max_new_tokens": "回答的最大长度（词元数）", "examples": "示例",
        "question": "你看到了什么？", "busy": "请等它答完，或先停止。",
        "no_answer": "还没有回答可以查看。",
    },
}
LANGUAGES = tuple(TEXTS)


def preferred(header: str | None) -> str:
    """A browser's Accept-Language -> the page's language."""
    first = (header or "").split(",")[0].strip().lower()
    return LANGUAGES[1] if first.startswith("zh") else LANGUAGES[0]
