"""From files, folders and packages to rows, divided among clients."""
