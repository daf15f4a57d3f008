# make demo: install, train and score the embedded default.   make test: the whole suite.
# Without make (Windows): the commands below are plain; README lists them.

PYTHON ?= python3
BIN := .venv/bin
OUT := out/demo

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/torchrun train_pretrain.py --eval_steps 100 --out $(OUT)/pretrain
	$(BIN)/python train_sft.py --lora --eval_steps 100 --model $(OUT)/pretrain --out $(OUT)/sft
	$(BIN)/python eval.py --model $(OUT)/sft --data emoji --report $(OUT)

test: .venv/installed-dev
	$(BIN)/python -m pytest

# The two stamps keep a second call from installing again; a changed list installs anew.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv out
