"""The stages of rejection-sampling alignment, one module each; nothing here imports Metaflow."""
