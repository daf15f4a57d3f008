"""What the model learns from: files -> samples -> batches. Never imports model/."""
