return standing(read_fetch())
