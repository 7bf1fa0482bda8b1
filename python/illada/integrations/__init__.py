"""Other people's frameworks on top of illada; each module imports its framework, so none is imported from here."""
