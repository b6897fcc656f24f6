"""Offsite-tuning: compress a model's middle into an emulator, hand it out as a kit, take back tuned adapter layers."""
