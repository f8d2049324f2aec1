"""Long-term memories of users; see README.md in this folder."""
