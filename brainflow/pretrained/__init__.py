"""Where weights live: their files, a warm start from them, the names of 2022, the hub, the card."""
