"""Reading other formats into a store; each module imports its own optional dependencies when it is called."""
