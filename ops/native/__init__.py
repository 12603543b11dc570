"""C++ for the CPU."""
def missing():
    return "not written yet"
