"""One run: settings, session, initial parameters, training stream, stage, method, final evaluation, resume guard."""
