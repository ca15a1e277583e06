"""One file per attention backend; `abstract` is their contract."""
