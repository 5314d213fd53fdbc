"""Results as JSON, text, HTML and plots."""
