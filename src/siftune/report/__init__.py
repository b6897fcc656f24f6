"""What results look like: tables, Markdown and pictures."""
