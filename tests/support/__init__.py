"""What the tests share: tiny models and tokenizers, oracles, trainers, kits, runs."""
