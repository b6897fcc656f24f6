"""Keep the base model's predictions on some texts by a KL penalty."""
