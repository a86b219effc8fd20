resource "aws_s3_bucket" "artefacts" {
  bucket = var.bucket
}

resource "aws_s3_bucket_versioning" "artefacts" {
  bucket = aws_s3_bucket.artefacts.id

  versioning_configuration {
    status = "Enabled"
  }
}

# S3's own keys and not KMS: the ETag of a single PUT stays the MD5 of its bytes, by which a source is known unread.
resource "aws_s3_bucket_server_side_encryption_configuration" "artefacts" {
  bucket = aws_s3_bucket.artefacts.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_public_access_block" "artefacts" {
  bucket                  = aws_s3_bucket.artefacts.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "artefacts" {
  bucket = aws_s3_bucket.artefacts.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_policy" "artefacts" {
  bucket = aws_s3_bucket.artefacts.id
  policy = data.aws_iam_policy_document.tls_only.json

  # S3 refuses a policy while the block is being put in place.
  depends_on = [aws_s3_bucket_public_access_block.artefacts]
}

data "aws_partition" "current" {}

locals {
  arn = "arn:${data.aws_partition.current.partition}:s3:::${var.bucket}"
}

data "aws_iam_policy_document" "tls_only" {
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [local.arn, "${local.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "artefacts" {
  bucket = aws_s3_bucket.artefacts.id

  # A filter of S3 knows prefixes and sizes, no pattern that would find runs/*/*/checkpoints. Under runs/ only shards of
  # checkpoints and weights of students are this large; records, reports and manifests are not, and stay.
  rule {
    id     = "checkpoints"
    status = "Enabled"

    filter {
      and {
        prefix                   = "${var.root_prefix}/runs/"
        object_size_greater_than = 268435456
      }
    }

    expiration {
      days = var.lifecycle_days.checkpoints
    }
  }

  rule {
    id     = "dead-letters"
    status = "Enabled"

    filter {
      prefix = "${var.root_prefix}/dead-letters/"
    }

    expiration {
      days = var.lifecycle_days.dead_letters
    }
  }

  rule {
    id     = "noncurrent"
    status = "Enabled"

    filter {
      prefix = ""
    }

    noncurrent_version_expiration {
      noncurrent_days = var.lifecycle_days.noncurrent
    }
  }

  rule {
    id     = "uploads"
    status = "Enabled"

    filter {
      prefix = ""
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = var.lifecycle_days.uploads
    }
  }

  depends_on = [aws_s3_bucket_versioning.artefacts]
}
