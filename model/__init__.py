"""What computes: pixels and token ids in, losses and logits out; no tokenizer, no data files."""
