"""The one pure rule that both sides of a charge must agree on: usage times rates is micro-credits.

llm_service tells the caller what a call cost, tokenstore_service books it; both compute it here, so that they can not
differ. Nothing else belongs in this package.
"""
