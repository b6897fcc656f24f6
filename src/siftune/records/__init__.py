"""Records of what every training row cost."""
