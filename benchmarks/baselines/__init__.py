"""What a user would run instead, re-created in this project's own words."""
