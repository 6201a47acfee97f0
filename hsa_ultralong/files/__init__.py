"""Checked access to files that a crash, a mistake or a stranger may have changed: opened strictly, written whole."""
