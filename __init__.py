"""The repository root; a package only so that readers which climb relative imports find a top."""
