-- Run once by PostgreSQL's image; the database tokenstore is made by POSTGRES_DB.
CREATE DATABASE llm;
CREATE DATABASE memory;
