"""Published models in their own folders, read and written without the library that they are made for."""
