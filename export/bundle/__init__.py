"""Model folders as the assets of a client: what each client expects, written, and checked with fresh eyes."""
