"""The OpenAI-compatible reverse proxy that sends each request to the pod where it costs least.

Read in this order: `pods` (what is known of each engine: a state table, and the work in flight), `health` (asks them),
`policies` (who gets a request), `recent_routes` (what was sent where a moment ago), `routing` (request -> pod),
`protocol` (the OpenAI bodies read here), `forwarding` (passes bytes on, retries), `app` (the HTTP routes), `serve` (the
process).
"""
