"""What sources/detection_starter.py composes its pictures of: cut-outs, backgrounds, pasting and wording."""
