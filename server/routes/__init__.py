"""The routes, one module per family. They read, ask the services and write; nothing else."""
