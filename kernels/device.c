// Opens the backend a worker asks for.
