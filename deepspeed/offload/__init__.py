"""Where states live between uses. Read in this order: `buffers`, `files`, `disk`, `swap`, `aio`."""
