"""The chat tab: one prompt to one to four models, column by column."""
